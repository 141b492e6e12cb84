"""What lives in Redis. Each module owns its keys; no other spells them."""
