"""The networks, in the order that docs/architecture.md gives; `overlock` exports them."""
