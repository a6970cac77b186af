"""The sandbox of a decoding child: what a process that reads untrusted bytes is not allowed to do."""
