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

# Zig has names of its own for the versions and features of Arm's architecture.
set(CMAKE_CXX_COMPILER ${CMAKE_BINARY_DIR}/zig-c++)
file(WRITE ${CMAKE_CXX_COMPILER} "#!/bin/sh
for option do
  shift
  case $option in
    -march=armv8*) option=$(echo \"$option\" |
      sed 's/-march=armv8-a/-mcpu=generic/; s/-march=armv8.2-a/-mcpu=generic+v8_2a/; s/+fp16/+fullfp16/') ;;
  esac
  set -- \"$@\" \"$option\"
done
exec '${ZIG}' c++ -target ${ZIG_TARGET} \"$@\"
")
file(CHMOD ${CMAKE_CXX_COMPILER} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)

# CMake wants the archiver, which is a command of Zig's, to be a program.
set(CMAKE_AR ${CMAKE_BINARY_DIR}/zig-ar)
set(CMAKE_RANLIB "")
file(WRITE ${CMAKE_AR} "#!/bin/sh\nexec '${ZIG}' ar \"$@\"\n")
file(CHMOD ${CMAKE_AR} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
