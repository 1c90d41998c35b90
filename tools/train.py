"""mmseg's tools/train.py with checks of config, data and checkpoint."""
from gdp_mmseg.cli.train import main

if __name__ == '__main__':
    main()
