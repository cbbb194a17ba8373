"""What the compiler makes of each kernel for each architecture, found out without a GPU."""
