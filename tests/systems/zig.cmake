# Compiles for other systems with Zig's C++ compiler: -DZIG=(its path) -DZIG_TARGET=aarch64-macos.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG ZIG_TARGET)
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR ${ZIG_TARGET})
if(ZIG_TARGET MATCHES "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
elseif(ZIG_TARGET MATCHES "windows")
  set(CMAKE_SYSTEM_NAME Windows)
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
set(CMAKE_CXX_COMPILER ${ZIG} c++ -target ${ZIG_TARGET})

# CMake wants the archiver, which is a command of Zig's, to be a program.
set(CMAKE_AR ${CMAKE_BINARY_DIR}/zig-ar)
set(CMAKE_RANLIB "")
file(WRITE ${CMAKE_AR} "#!/bin/sh\nexec '${ZIG}' ar \"$@\"\n")
file(CHMOD ${CMAKE_AR} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
