"""For every test: threads that wait instead of spinning, as the command line has them. It must be set before torch loads."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
