from distill_nb.cli import main

main()
