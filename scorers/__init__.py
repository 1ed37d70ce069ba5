"""One file per score; see README.md for how to add one."""
