"""Where weights come from, what this machine can do with them, and the base with its adapter."""
