"""HTML pages that need no server, no network and no fonts; `report` and `compare` fill them."""
