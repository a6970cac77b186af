"""The model: native PyTorch modules for the vision encoder, the Q-Former, OPT and T5."""
