"""Seqera Platforms: paired, asked who users are, and for their logins."""
