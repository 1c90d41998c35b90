"""A small data set of drawn shapes in Pascal VOC layout."""
from gdp_mmseg.demo.data import main

if __name__ == '__main__':
    main()
