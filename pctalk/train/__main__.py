import sys

from .starter import main

sys.exit(main())
