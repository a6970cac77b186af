"""What a run says of its cluster: what it waits for, and which nodes and workers it has lost or got."""
