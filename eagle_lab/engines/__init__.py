"""What can be an arm: another checkout, another engine, a server. Empty until arms of any kind are built."""
