"""`python -m torch_simu`: the command line."""

from torch_simu.unlearning.cli import main

if __name__ == "__main__":
    main()
