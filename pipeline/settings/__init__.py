"""The settings of every command, what the stages are told, and the fingerprint of what decides the rows."""
