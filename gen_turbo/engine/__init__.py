"""Architecture families, one file each, and what installs a reducer on them and takes it off again."""
