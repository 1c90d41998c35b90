"""Show which channels of a config's model can be pruned."""
from gdp_mmseg.cli.groups import main

if __name__ == '__main__':
    main()
