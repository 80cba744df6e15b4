"""The operators: selective scan, and those that the original wrote in Triton."""
