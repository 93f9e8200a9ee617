"`python -m ddpo_nb` is the command line `ddpo-nb`."
from ddpo_nb.cli import main

if __name__ == "__main__": raise SystemExit(main())
