"""Files on a disk or in an object store: whole or not there, tried again when the store fails."""
