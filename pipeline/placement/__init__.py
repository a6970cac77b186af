"""Where the stages run: what a cluster offers, and what each worker reserves of it."""
