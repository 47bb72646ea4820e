"""Side-by-side measurements: this project and its peers, each in a process of its own, in one run."""
