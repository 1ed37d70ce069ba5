"""One file per mixture; see README.md for how to add one."""
