"""What tools/benchmarks/ has in common: the contenders, and how they are measured."""
