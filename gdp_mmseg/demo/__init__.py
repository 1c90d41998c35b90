"""Demo: drawn shapes, two trainings, an export and a picture of them."""
