"""What can be an arm: this decoder, another checkout, another engine, a server."""
