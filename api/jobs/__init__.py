"""Builds, mirrors and scans over the wire, and how far they are."""
