"""Every setting of a run, and how YAML and the command line become one."""
