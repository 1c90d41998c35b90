"""Export a gated checkpoint as a pruned config and checkpoint."""
from gdp_mmseg.cli.export import main

if __name__ == '__main__':
    main()
