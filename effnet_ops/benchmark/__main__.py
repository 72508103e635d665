"""`python -m effnet_ops.benchmark HANDLE`: a worker, on the end of a pipe that it inherits from the parent."""

import sys
from multiprocessing.connection import Connection

from effnet_ops.benchmark.worker import serve

if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
