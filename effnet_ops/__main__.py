"""`python -m effnet_ops` is `effnet-ops`."""

from effnet_ops.cli import app

app(prog_name="effnet-ops")
