import sys

from earlyfusion.cli import main

sys.exit(main())
