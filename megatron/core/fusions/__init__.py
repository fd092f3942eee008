"""Operations with several implementations; each file defines the eager reference first."""
