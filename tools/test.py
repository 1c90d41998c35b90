"""mmseg's tools/test.py with checks of config, data and checkpoint."""
from gdp_mmseg.cli.test import main

if __name__ == '__main__':
    main()
