"""Files on a disk or in an object store: each is there as a whole or not at all; requests can be retried."""
