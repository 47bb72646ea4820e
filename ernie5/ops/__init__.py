"""The hot operations, one file each: a reference in plain Paddle that defines the meaning."""
