"""What keeps one request from stopping the others: costs, admission, and checks of what comes in."""
