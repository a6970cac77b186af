"""What a cluster needs, carried by the wheel, and the command that writes it where it can be edited."""
