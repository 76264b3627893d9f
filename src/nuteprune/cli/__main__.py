"""`python -m nuteprune.cli`, which `torchrun -m` and `accelerate launch -m` start too."""

from nuteprune.cli.app import main

main()
