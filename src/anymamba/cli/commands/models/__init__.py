"""Commands about models on disk and on the hub."""
