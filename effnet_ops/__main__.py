"""`python -m effnet_ops` is `effnet-ops`."""

from effnet_ops.cli import app

if __name__ == "__main__":
    app(prog_name="effnet-ops")
