"""Cython kernels: calculations on bytes, without loop, Redis, logging, configuration or clock."""
