"""Commands only; nothing imports them but tests and each other's shims."""
