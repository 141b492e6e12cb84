"""Benchmarks, and the parts that they share with the tests: real images and a real upstream registry."""
