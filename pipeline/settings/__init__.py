"""What a job is told, and the fingerprint of what decides its rows."""
