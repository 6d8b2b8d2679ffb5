"""`python -m torch_simu`: the command line."""

from torch_simu.cli.app import main

if __name__ == "__main__":
    main()
