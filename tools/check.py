"""Check of one config: prune half of its model at random, compare outputs."""
from gdp_mmseg.cli.check import main

if __name__ == '__main__':
    main()
