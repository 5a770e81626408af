"""Writers of small data sets in the official formats; they name files and folders independently of the code under test."""
