"""What a run is: typed sections, the flags and YAML files made from them, and named recipes."""
