"""The Ray that a command starts for itself on one machine, with few processes."""
